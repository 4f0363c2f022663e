"""Speed of training and of what it is made of, on any device and on one that is lent."""
