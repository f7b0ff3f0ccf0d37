"""Why a plan is as it is: what fills its peak, what it recomputes, what more memory would buy."""
