"""What the suites of hostile guests share: the guests' texts, and `Attack`, which watches what they cost and whom they reach."""
