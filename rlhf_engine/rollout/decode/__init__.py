"""The trunk as a decoder: one token per sequence and step."""
