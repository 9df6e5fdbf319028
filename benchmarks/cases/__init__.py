"""The cases, a module per family; importing a module registers its cases."""
