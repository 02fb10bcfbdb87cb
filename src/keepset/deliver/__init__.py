"""What leaves the folder: dataset card, trainers' configurations, the hub."""
