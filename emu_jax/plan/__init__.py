"""What a step takes on devices that are not rented yet."""
