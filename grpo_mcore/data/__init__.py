"""Questions and answers from files or datasets, and the order in which steps use them."""
