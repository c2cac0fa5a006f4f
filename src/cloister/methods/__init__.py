"""The methods, end to end on one machine: the processes of a deployment, and the baselines to compare with."""
