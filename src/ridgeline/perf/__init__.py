"""What things cost: counting ops, the machine's rates, and the limit that follows. Runs nothing."""
