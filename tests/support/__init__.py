"""What the tests are made from."""
