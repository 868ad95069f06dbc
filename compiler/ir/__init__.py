"""The intermediate representation: an SSA graph with symbolic dims and layouts in its types."""
