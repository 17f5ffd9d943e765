"""What makes the documentation site out of the repository: hooks of mkdocs (mkdocs.yml), no copies of any text."""
