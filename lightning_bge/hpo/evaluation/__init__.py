"""What a study may say about its winner: estimates that the choice of the winner does not make optimistic."""
