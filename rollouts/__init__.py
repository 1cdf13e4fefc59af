"""Where sequences come from: prompt data, trajectories, rollout engines, teachers and the weight
sync."""
