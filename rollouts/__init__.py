"""Where sequences come from: prompt data, trajectories, rollout engines and the weight sync."""
