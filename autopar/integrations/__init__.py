"""autopar as the back end of training libraries. Each module needs its library (an extra)."""
