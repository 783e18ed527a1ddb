"""Networks, and the files that hold weights and calibrations."""
