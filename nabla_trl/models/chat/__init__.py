"""What chat templates and special tokens mean: control tokens written in a text, and where thoughts begin and end."""
