"""The process that runs the trunk."""
