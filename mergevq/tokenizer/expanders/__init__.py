"""Ways from kept tokens back to the grid."""
