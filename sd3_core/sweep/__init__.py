"""Settings compared: one or two of them vary, every cell is drawn, measured and shown in a grid."""
