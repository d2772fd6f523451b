"""What training shares: data, rewards, the stages and their recipes, the loop; a backend gives the step."""
