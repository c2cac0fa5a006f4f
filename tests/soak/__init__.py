"""Hours of jobs with faults, and queries to one enclave by clients that misbehave: nothing may grow."""
