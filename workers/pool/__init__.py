"""The adapter pool: pages, blocks and tables of the resident adapters, and who stays resident."""
