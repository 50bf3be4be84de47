"""What ``minrl report`` is made of: reading runs, statistics, tables, figures, pages."""
