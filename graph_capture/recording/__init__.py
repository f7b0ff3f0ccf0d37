"""Write down a step's calls as eager makes them, what they hand out and leave behind."""
