"""The screens that open above the columns, and the engine beside them."""
