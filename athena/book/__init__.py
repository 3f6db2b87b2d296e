"""What the book's chapters call: figures, tables and widgets."""
