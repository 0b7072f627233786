"""When each operator of a step runs, and what it keeps, within a memory budget."""
