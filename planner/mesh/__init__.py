"""What each rank of a mesh of devices holds, computes and sends, before any of them is there."""
