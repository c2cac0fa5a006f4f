"""The party process: its own data through the former layers, sealed, sent once; results back."""
