"""A run made whole, and what leaves it: dataset card, trainers' configurations, the hub, the run done again."""
