"""A plan as text, HTML and trace."""
