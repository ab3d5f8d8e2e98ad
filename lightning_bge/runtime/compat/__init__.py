"""The only modules that use private names of other libraries: one module a library, each name with its reason."""
