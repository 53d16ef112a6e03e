"""What solving costs: layers beside their floors, networks beside a training step."""
