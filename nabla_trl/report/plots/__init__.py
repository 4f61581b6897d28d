"""The report's figures: what they show, and the house style in which they are drawn."""
