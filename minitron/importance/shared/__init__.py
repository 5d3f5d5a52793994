"""What width and depth metrics share."""
