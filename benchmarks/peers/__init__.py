"""What we are measured against: other people's packages, called as their documents say, and plain PyTorch."""
