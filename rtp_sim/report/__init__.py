"""What people look at: tables, Chrome traces, the HTML report and plots, made from timelines and metrics."""
