"""A fuzzer of the files that a user gives: seeded mutations of valid files, through the functions that the commands call."""
