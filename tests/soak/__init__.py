"""The long checks of `make soak`, and the report that they write."""
