"""Plans in the training loops of other libraries; a file is imported where it is used."""
