"""A static page that runs a tokenizer in its visitor's browser; the files beside this are it."""
