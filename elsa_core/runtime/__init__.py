"""What every run needs: errors, whole files, preemption, command lines."""
