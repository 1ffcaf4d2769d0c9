"""The models that are served: by what name, of which files, and how they are replaced."""
