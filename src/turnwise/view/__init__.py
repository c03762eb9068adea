"""What people see: the live terminal and the report."""
