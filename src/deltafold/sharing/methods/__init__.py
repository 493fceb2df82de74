"""What `share` decides and starts from: plans, first factors, the schedule of replacement. Pure."""
