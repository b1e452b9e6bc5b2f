"""What the commands do, above both adapters."""
