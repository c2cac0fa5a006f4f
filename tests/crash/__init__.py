"""Every role is killed at seeded points and started again: the job must end with the same adapter, to the last byte."""
