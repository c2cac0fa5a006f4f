"""Records to token packs: reading, rendering, tokenising, packing, and their form inside a bundle."""
