"""Students as a service: Open Inference Protocol v2 and raw images over Ray Serve."""
