"""The recurrent cores as parts of other libraries: one module for each, imported on its own."""
