"""From pictures to proof: which pairs are copies, how likely, and where; what search, scan and inspect ask."""
