"""The network: pools, plan and firewall decide (pure); apply and the agent's netrules act."""
